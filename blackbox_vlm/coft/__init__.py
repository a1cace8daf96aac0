"""CoFT and CoFT+: tuning without labels."""
