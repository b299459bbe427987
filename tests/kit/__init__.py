"""What several test files share: pictures, files, sources, towers, runs, and faults made on purpose."""
