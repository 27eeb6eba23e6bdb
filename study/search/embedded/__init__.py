"""A Ray of the study's own on this machine: started, closed to others, watched over, ended."""
