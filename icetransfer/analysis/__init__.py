"""The statistics: intervals, laws of decay, the published study, tables."""
