"""The networks and their geometry: HaMeR, the teacher's checkpoint, students, the MANO layer, crops and labels."""
