"""HTML, charts, pictures and provenance shared by the reports."""
