"""What a study is: its settings and YAML, its space, its objectives, its bounds."""
