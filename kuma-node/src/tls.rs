//! TLS from two PEM files, which can be replaced while the server runs.
//!
//! Invariant: what is put in force was checked as a whole. A new certificate with the old key is refused, and what was in force stays, so
//! that files which are replaced one after the other do no harm. Nothing of a key is in a message.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum_server::tls_rustls::RustlsConfig;
use jiff::{SignedDuration, Timestamp};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use zeroize::Zeroizing;

use crate::config::TlsFiles;

/// Whoever renews certificates does so earlier.
const EXPIRES_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// Why the files cannot be used. What was in force still is.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file has no certificate in it.
    #[error("{} has no certificate in it; it needs the chain as PEM (-----BEGIN CERTIFICATE-----), the server's own first", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// The file has no private key in it.
    #[error("{} has no private key in it; it needs one as PEM (-----BEGIN PRIVATE KEY-----), not encrypted", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The file is not PEM.
    #[error("{} is damaged: what is in it is not PEM", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
    },
    /// The two belong to different pairs.
    #[error("the key in {} is not the one of the first certificate in {}; were both files replaced?", key.display(), cert.display())]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The TLS library refuses them.
    #[error("{} and {} cannot be used", cert.display(), key.display())]
    Refused {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// Reads the files. Also returns what should be warned of: a key that others can read, a certificate that expires soon.
///
/// # Errors
/// [`TlsError`] names the file and what is wrong with it.
pub fn load(files: &TlsFiles) -> Result<(RustlsConfig, Vec<String>), TlsError> {
    let (config, warnings) = server_config(files)?;
    Ok((RustlsConfig::from_config(Arc::new(config)), warnings))
}

/// Reads the files again. New connections use them, those that are open go on.
///
/// # Errors
/// As [`load`]; what was in force stays in force.
pub fn reload(config: &RustlsConfig, files: &TlsFiles) -> Result<Vec<String>, TlsError> {
    let (new, warnings) = server_config(files)?;
    config.reload_from_config(Arc::new(new));
    Ok(warnings)
}

fn server_config(files: &TlsFiles) -> Result<(ServerConfig, Vec<String>), TlsError> {
    let TlsFiles { cert, key } = files;
    let mut warnings = Vec::new();
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&read(cert)?)
        .collect::<Result<_, _>>()
        .map_err(|_| TlsError::NotPem { path: cert.clone() })?;
    let first = chain.first().ok_or_else(|| TlsError::NoCertificate { path: cert.clone() })?;
    warnings.extend(not_after(first).and_then(|at| expiry_warning(cert, at, Timestamp::now())));
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => TlsError::NoKey { path: key.clone() },
        _ => TlsError::NotPem { path: key.clone() },
    })?;
    let mode = fs::metadata(key).map_or(0, |metadata| metadata.mode());
    if mode & 0o007 != 0 {
        warnings.push(format!(
            "the private key {} can be used by every user (mode {:03o}); make it 0600",
            key.display(),
            mode & 0o777
        ));
    }
    let refused = |source| match source {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch { cert: cert.clone(), key: key.clone() },
        source => TlsError::Refused { cert: cert.clone(), key: key.clone(), source },
    };
    // Named, not the process's default: a library that installs another one cannot change it.
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(refused)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, warnings))
}

/// Wiped from memory: one of the two is a key.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Zeroizing::new(bytes)),
        Err(source) => Err(TlsError::Unreadable { path: path.to_owned(), source }),
    }
}

fn expiry_warning(path: &Path, at: Timestamp, now: Timestamp) -> Option<String> {
    if at <= now {
        Some(format!("the certificate in {} expired at {at}: clients will refuse it", path.display()))
    } else if at.duration_since(now) < EXPIRES_SOON {
        Some(format!("the certificate in {} expires at {at}", path.display()))
    } else {
        None
    }
}

/// Until when a certificate is valid, if that can be found: it is only warned of. RFC 5280, 4.1: a sequence of a sequence of version (tagged,
/// optional), serial number, algorithm, issuer, and validity, which is two times.
fn not_after(der: &[u8]) -> Option<Timestamp> {
    const VERSION: u8 = 0xa0;
    let (_, certificate, _) = element(der)?;
    let (_, mut fields, _) = element(certificate)?;
    if fields.first() == Some(&VERSION) {
        fields = element(fields)?.2;
    }
    for _ in ["serial number", "algorithm", "issuer"] {
        fields = element(fields)?.2;
    }
    let (_, validity, _) = element(fields)?;
    let (_, _, rest) = element(validity)?;
    let (tag, time, _) = element(rest)?;
    let time = std::str::from_utf8(time).ok()?;
    // UTCTime has two digits of the year: from 50 on they are of the 20th century.
    let time = match (tag, time.get(..2)?) {
        (0x17, year) if year >= "50" => format!("19{time}"),
        (0x17, _) => format!("20{time}"),
        (0x18, _) => time.to_owned(),
        _ => return None,
    };
    let part = |range: std::ops::Range<usize>| time.get(range);
    let (date, clock) = ((part(0..4)?, part(4..6)?, part(6..8)?), (part(8..10)?, part(10..12)?, part(12..14)?));
    format!("{}-{}-{}T{}:{}:{}Z", date.0, date.1, date.2, clock.0, clock.1, clock.2).parse().ok()
}

/// The first DER element: its tag, its content, and what is behind it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, short], rest) = der.split_first_chunk()?;
    let (length, rest) = match short {
        0..=0x7f => (usize::from(short), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(short & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, behind) = rest.split_at_checked(length)?;
    Some((tag, content, behind))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use rcgen::{CertificateParams, CertifiedKey, KeyPair, date_time_ymd, generate_simple_self_signed};

    use super::*;

    fn pair() -> (String, String) {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (cert.pem(), signing_key.serialize_pem())
    }

    fn files(cert: &str, key: &str) -> (tempfile::TempDir, TlsFiles) {
        let dir = tempfile::tempdir().unwrap();
        let files = TlsFiles { cert: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
        fs::write(&files.cert, cert).unwrap();
        fs::write(&files.key, key).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        (dir, files)
    }

    #[test]
    fn a_pair_is_taken_and_offers_http_2_and_1() {
        let (cert, key) = pair();
        let (_dir, files) = files(&cert, &key);
        let (config, warnings) = load(&files).unwrap();
        assert_eq!(config.get_inner().alpn_protocols, [b"h2".to_vec(), b"http/1.1".to_vec()]);
        assert!(warnings.is_empty(), "{warnings:?}");
    }

    #[test]
    fn each_thing_that_is_wrong_has_its_message() {
        let ((cert, key), (_, other_key)) = (pair(), pair());
        let cut = format!("{}\n-----END", &cert[..cert.len() / 2]);
        let message = |cert: &str, key: &str| {
            let (dir, files) = files(cert, key);
            load(&files).unwrap_err().to_string().replace(&dir.path().display().to_string(), "DIR")
        };
        insta::assert_snapshot!(message(&cert, &other_key), @"the key in DIR/key.pem is not the one of the first certificate in DIR/cert.pem; were both files replaced?");
        insta::assert_snapshot!(message(&key, &key), @"DIR/cert.pem has no certificate in it; it needs the chain as PEM (-----BEGIN CERTIFICATE-----), the server's own first");
        insta::assert_snapshot!(message(&cert, &cert), @"DIR/key.pem has no private key in it; it needs one as PEM (-----BEGIN PRIVATE KEY-----), not encrypted");
        insta::assert_snapshot!(message("", &key), @"DIR/cert.pem has no certificate in it; it needs the chain as PEM (-----BEGIN CERTIFICATE-----), the server's own first");
        insta::assert_snapshot!(message(&cut, &key), @"DIR/cert.pem is damaged: what is in it is not PEM");
        insta::assert_snapshot!(message(&cert, "-----BEGIN PRIVATE KEY-----\n!!!\n-----END PRIVATE KEY-----\n"), @"DIR/key.pem is damaged: what is in it is not PEM");
        insta::assert_snapshot!(message(&cert, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), @"DIR/cert.pem and DIR/key.pem cannot be used");
        let (dir, files) = files(&cert, &key);
        fs::remove_file(&files.key).unwrap();
        let error = load(&files).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot read {}", dir.path().join("key.pem").display()));
    }

    /// Shakes hands in memory, with a client that trusts `trusted` alone. Returns the protocol they agreed on.
    fn handshake(config: &RustlsConfig, trusted: &str) -> Result<Vec<u8>, rustls::Error> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap()).unwrap();
        let mut client =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = rustls::ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap())?;
        let mut server = rustls::ServerConnection::new(config.get_inner())?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets()?;
            }
        }
        Ok(server.alpn_protocol().unwrap_or_default().to_vec())
    }

    #[test]
    fn new_files_come_into_force_and_bad_ones_do_not() {
        let (cert, key) = pair();
        let (_dir, files) = files(&cert, &key);
        let (config, _) = load(&files).unwrap();
        assert_eq!(handshake(&config, &cert).unwrap(), b"h2");
        let (new_cert, new_key) = pair();
        fs::write(&files.cert, &new_cert).unwrap();
        assert!(matches!(reload(&config, &files), Err(TlsError::Mismatch { .. })), "half of it is new");
        assert_eq!(handshake(&config, &cert).unwrap(), b"h2");
        fs::write(&files.key, new_key).unwrap();
        assert!(reload(&config, &files).unwrap().is_empty());
        assert_eq!(handshake(&config, &new_cert).unwrap(), b"h2");
        assert!(handshake(&config, &cert).is_err(), "the old one is not shown any more");
    }

    #[test]
    fn a_key_that_others_can_read_is_warned_of() {
        let (cert, key) = pair();
        let (_dir, files) = files(&cert, &key);
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o644)).unwrap();
        let (_, warnings) = load(&files).unwrap();
        assert!(warnings.len() == 1 && warnings[0].contains("mode 644"), "{warnings:?}");
    }

    #[test]
    fn a_certificate_that_expires_is_warned_of() {
        let key = KeyPair::generate().unwrap();
        for (year, at) in
            [(2001, "2001-02-03T00:00:00Z"), (2049, "2049-02-03T00:00:00Z"), (2051, "2051-02-03T00:00:00Z")]
        {
            let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            params.not_before = date_time_ymd(1999, 1, 1);
            params.not_after = date_time_ymd(year, 2, 3);
            let cert = params.self_signed(&key).unwrap();
            let at: Timestamp = at.parse().unwrap();
            assert_eq!(not_after(cert.der()), Some(at));
            let (_dir, files) = files(&cert.pem(), &key.serialize_pem());
            let (_, warnings) = load(&files).unwrap();
            assert_eq!(warnings.iter().any(|warning| warning.contains("expired at")), year == 2001, "{warnings:?}");
            let day = SignedDuration::from_hours(24);
            assert!(expiry_warning(&files.cert, at, at - day).unwrap().contains("expires at"));
            assert!(expiry_warning(&files.cert, at, at - day * 30).is_none());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_look_at_the_expiry_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = not_after(&bytes);
        }
    }
}
