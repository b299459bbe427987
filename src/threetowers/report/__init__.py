"""The report of a comparison: page, tables and plots. It reads files only and never imports torch."""
