"""What all trainers share: run folders, training stages, processes, interrupts."""
