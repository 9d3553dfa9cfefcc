//! Power and space run out.
