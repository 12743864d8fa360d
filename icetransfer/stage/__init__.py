"""What every stage needs: files that are whole or absent, a progress bar, what it cost."""
