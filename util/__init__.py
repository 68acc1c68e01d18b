"""What knows neither CLIP nor denoisers: commands and their errors, whole files, picture grids."""
