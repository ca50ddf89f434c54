"""Tele-operation of the Piper: a person moves the arm, or its twin, and the episodes become a data set."""
