"""An experiment's identity: what each start ran with, and what a later start may change."""
