"""Profile: what `aegpo profile-entropy` finds in the attention of a run, in tables, figures and a page."""
