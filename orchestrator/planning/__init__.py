"""From options to cells: what to measure, on which model. No worker is started here."""
