"""`kdhooks demo`: a small network learns from a real teacher on real faces."""
