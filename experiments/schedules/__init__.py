"""Pipeline schedules as a user names and sees them: found by name or file, drawn in a terminal, as SVG and as a page."""
