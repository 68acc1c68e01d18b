"""The embedded default: a closed world, its pair benchmark, its frozen weights and their making."""
