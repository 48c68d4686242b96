"""The analysis of internal policies: settings, stages of the work, results, the boundary layer, sweeps."""
