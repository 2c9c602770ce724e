"""Verification of a final evaluation by pycocotools, in a process of its own."""
