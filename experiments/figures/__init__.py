"""The paper's claims, computed and drawn: one binary a claim."""
