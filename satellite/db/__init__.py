"""The satellite's database: schema by numbered migrations, reads inline, one committer."""
