"""From options to a plan: the cells to measure, on which model. No worker is started here."""
