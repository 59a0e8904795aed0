//! scratch
#[global_allocator] static A: mimalloc::MiMalloc = mimalloc::MiMalloc;
use kuma_core::*; use serde::{Serialize,Deserialize}; use std::time::Instant;
#[derive(Default,Clone,Serialize,Deserialize)] struct C{n:u64}
#[derive(Serialize,Deserialize)] enum Ev{ P{ #[serde(with="serde_bytes")] d: Vec<u8>} }
impl Entity for C{ const KIND:&'static str="c"; type Event=Ev; fn apply(&mut self,_:&Ev){self.n+=1;} }
#[tokio::main] async fn main(){
 let a:Vec<usize>=std::env::args().skip(1).map(|x|x.parse().unwrap()).collect(); let (total,batch,inflight)=(a[0],a[1],a[2]);
 let dir="/work/main/target/zzperf"; let _=std::fs::remove_dir_all(dir);
 let k=Kuma::start(Options::new(dir)).await.unwrap();
 let writers=200; let per=total/writers/batch;
 for w in 0..writers { k.entity::<C>(format!("e{w}")).append(Ev::P{d:vec![0;8]}).await.unwrap(); }
 let g0:u64=k.stats().shards.iter().map(|s|s.writer.unwrap().groups).sum();
 let t=Instant::now(); let mut js=vec![];
 for w in 0..writers { let k=k.clone(); js.push(tokio::spawn(async move{ let h=k.entity::<C>(format!("e{w}")); let mut q=std::collections::VecDeque::new();
   for i in 0..per { let evs=(0..batch).map(|j|Ev::P{d:vec![(i+j) as u8;200]}); q.push_back(h.append_all(evs).submit().await.unwrap()); if q.len()>=inflight { q.pop_front().unwrap().await.unwrap(); } }
   for p in q { p.await.unwrap(); } })); }
 for j in js { j.await.unwrap(); }
 let e=t.elapsed().as_secs_f64(); let st=k.stats(); let g:u64=st.shards.iter().map(|s|s.writer.unwrap().groups).sum::<u64>()-g0;
 println!("{:.0} ev/s  {:.1} appends/commit ckpt {:?}", (per*batch*writers) as f64/e, (per*writers) as f64/g as f64, st.shards.iter().map(|s|(s.writer.unwrap().checkpoints,s.writer.unwrap().wal_pages)).collect::<Vec<_>>());
 let s=std::fs::read_to_string("/proc/self/stat").unwrap(); let f:Vec<&str>=s.rsplit(')').next().unwrap().split_whitespace().collect(); println!("cpu us/ev {:.2}", (f[11].parse::<f64>().unwrap()+f[12].parse::<f64>().unwrap())*10000.0/(per*batch*writers) as f64);
 let t=Instant::now(); k.shutdown().await; println!("shutdown {:?}",t.elapsed());
}
