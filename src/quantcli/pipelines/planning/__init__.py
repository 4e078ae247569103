"""What a quantize run will do, decided before anything is written."""
