"""`quantize --backend`: a job for another package, whose result is then treated as ours are."""
