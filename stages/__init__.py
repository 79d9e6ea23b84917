"""The offline data stages as plain functions: synthesise, ingest, teach. They run in a test without Ray or YAML."""
