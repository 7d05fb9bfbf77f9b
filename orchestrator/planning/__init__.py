"""From options to cells: what to measure, on which model. No process is started here."""
