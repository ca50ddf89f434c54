"""A judge against episodes with known outcome."""
