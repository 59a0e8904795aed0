//! stub
pub fn build_info() -> &'static str {
    ""
}
pub fn memory() -> Option<u64> {
    None
}
