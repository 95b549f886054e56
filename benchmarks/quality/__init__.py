"""What each method reaches on real tasks."""
