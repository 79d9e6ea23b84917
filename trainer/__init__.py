"""Everything that learns from caches: data, losses, loop, metrics, evaluate, compare. Never loads a teacher."""
