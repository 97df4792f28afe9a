"""What a step costs on a machine: what is predicted of it, and the time modelled from that."""
