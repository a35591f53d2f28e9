"""The commands around arcface_torch: run, doctor, taps, cache, export and evaluate."""
