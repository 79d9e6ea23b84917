"""Bytes on disk: manifest, cache, shard reader, encodings, ledger. Imports neither torch, ray, mlflow nor timm."""
