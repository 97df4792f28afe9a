"""What the text sources share: corpora, tokenizers, token files, windows and the shuffle."""
