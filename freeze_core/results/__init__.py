"""What results have in common: intervals, tables, and of which model and data they are."""
