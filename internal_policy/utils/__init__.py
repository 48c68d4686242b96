"""What every other part of the package uses: errors, files, progress, processes."""
