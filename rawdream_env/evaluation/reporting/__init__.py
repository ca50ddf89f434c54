"""HTML, charts, images and provenance shared by the reports."""
