"""What both judges, eval_mmvp.py and eval_zeroshot.py, share: encoder, pair sets, scores."""
