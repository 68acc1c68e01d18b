"""What stands around the loop of train.py: processes, assembly, checkpoints, log, plan, shards."""
