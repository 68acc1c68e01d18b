"""What others trained and this project starts from: CLIP towers, tokenizers, FLUX.1."""
