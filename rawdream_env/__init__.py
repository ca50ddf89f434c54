"""RAW-Dream as Gymnasium environments."""
