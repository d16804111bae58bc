"""What compression costs in quality: model x methods x budgets x tasks, each cell measured once at equal kept bytes."""
