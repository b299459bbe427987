"""Run folders to pages, tables and plots; reads files only and never imports torch."""
