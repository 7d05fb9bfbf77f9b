"""From options to cells: what would be measured, on which model. Nothing is started."""
