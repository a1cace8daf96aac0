"""Backends that ship with Blackbox-VLM: each turns requests into answers and knows no budget."""
