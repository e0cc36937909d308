"""What is measured: checks, the gate that reads them, the verdict."""
