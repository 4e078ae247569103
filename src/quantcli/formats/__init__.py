"""How quantized linears look on disk, one file per format (`codecs` lists them), and who opens them."""
