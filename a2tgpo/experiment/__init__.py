"""An experiment is what it was started as: what each start ran with, and what a later start may change."""
