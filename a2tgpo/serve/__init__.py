"""An exported agent behind an HTTP interface: its protocol on disk, the queue of questions, the endpoint."""
