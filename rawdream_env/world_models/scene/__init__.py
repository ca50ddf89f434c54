"""A world model of object states: a reader of the start picture, and a painter of the pictures to come."""
