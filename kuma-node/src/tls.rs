//! stub
use axum_server::tls_rustls::RustlsConfig;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct TlsError;
pub fn load(_: &crate::config::TlsFiles) -> Result<RustlsConfig, TlsError> {
    Err(TlsError)
}
pub async fn reload(_: &RustlsConfig, _: &crate::config::TlsFiles) -> Result<(), TlsError> {
    Err(TlsError)
}
